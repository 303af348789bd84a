"""Fine-tune Idefics2 to answer questions about document pages, with QLoRA, under PyTorch Lightning."""
