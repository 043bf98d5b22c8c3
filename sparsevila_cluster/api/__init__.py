"""What Python users import: VideoQA, AsyncVideoQA, ask_many, pictures of evidence."""
