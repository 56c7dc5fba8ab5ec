"""What a run leaves for others: results, comparison, card, and the Hub."""
