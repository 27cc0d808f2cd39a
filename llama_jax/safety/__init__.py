"""Safety (paper section 4): pre-prompts, context distillation, red teaming and false refusals."""
