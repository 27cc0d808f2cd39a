"""Pretraining (paper section 2), and the parts that every stage on a language model shares."""
