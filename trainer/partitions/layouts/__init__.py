"""How each kind of DeepSpeed optimizer keeps the master weights of one rank."""
