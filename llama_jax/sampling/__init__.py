"""Generation from token ids to token ids; text, templates and rewards stay outside."""
