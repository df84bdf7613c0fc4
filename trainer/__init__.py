"""Everything that runs beside, or inside, the training job."""
