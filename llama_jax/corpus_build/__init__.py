"""From documents to token blocks (paper section 2.1): pure functions on documents, and the in-process build of them."""
