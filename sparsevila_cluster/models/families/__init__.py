"""Model families: from media to visual tokens and prompts."""
