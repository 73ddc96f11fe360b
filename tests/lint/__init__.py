"""What can be checked by reading: documents, headers of scripts, pictures."""
