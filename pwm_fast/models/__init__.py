"""What is learned: the world model, policies and critics.

They know nothing of environments; policies and critics carry a leading population axis P.
"""
