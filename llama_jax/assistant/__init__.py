"""The demo's documentation assistant: real documents, questions, refusals and a simulated annotator, made
from any Python installation, so that every stage of the recipe has honest input wherever it runs."""
