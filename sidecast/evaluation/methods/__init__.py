"""What can be done to a run besides its optimizer's steps, one method a file."""
