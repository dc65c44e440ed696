"""Prompts with a place for an answer, and the words that may stand there."""
