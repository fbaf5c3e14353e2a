"""A plan written in the words of another tool."""
