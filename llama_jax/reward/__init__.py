"""Reward models (paper section 3.2.2)."""
