"""Small models as functions of many parameter vectors at once."""
