"""Supervised fine-tuning on dialogs (paper section 3.1)."""
