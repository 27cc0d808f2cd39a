"""Every number of the paper, one file a stage. Imports ml_collections and configs.common only."""
