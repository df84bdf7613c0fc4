"""The wire, and nothing else: generated messages, shard arithmetic and the byte codec."""
