"""What each head does: scores, circuits and one-line cards."""
