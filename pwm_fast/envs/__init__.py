"""Environments: the table of tasks, the differentiable dflex tasks, Gymnasium fronts and evaluation.

Importing this package registers the Gymnasium ids (``pwm_fast/Humanoid-v0`` and the like) when Gymnasium is installed.
"""
