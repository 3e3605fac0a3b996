"""What would a merge cost, and which way is the best? Nothing here changes a file."""
