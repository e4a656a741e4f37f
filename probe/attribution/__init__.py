"""Relevance: rules, books, baselines, faithfulness; the way in is `attribute`."""
