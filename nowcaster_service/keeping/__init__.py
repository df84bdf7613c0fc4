"""What a run's history is worth once the service has died: records beside the files, and what is made of them."""
