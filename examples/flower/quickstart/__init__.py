"""A quickstart's federation with an audit: its clients are like those of the tutorials."""
