"""How it is learned: world-model pre-training, imagination, policy extraction, fine-tuning."""
