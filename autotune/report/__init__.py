"""What a search found, as CSV, as one HTML page and on the console."""
