"""What both ends of the wire agree on below the messages: the service's name, and how gRPC moves bulk data."""

from __future__ import annotations

from sidecast.protos import nowcast_pb2 as pb

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Nowcaster"].full_name

# Keys of the metadata of calls: the token that all clients share, and the secret of the run that a call is about.
AUTHORIZATION_KEY = "authorization"
RUN_SECRET_KEY = "sidecast-run-secret"
# As many characters as nobody guesses, and as metadata hold with ease.
MIN_RUN_SECRET_CHARACTERS, MAX_RUN_SECRET_CHARACTERS = 16, 128

# gRPC's defaults suit small messages (figures: docs/adr/0012-transport.md).
BULK_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.write_buffer_size", 8 << 20),
)
# For processes that move bulk: glibc would give every large message fresh pages from the kernel and hand them back
# after it, which costs more than the copy. Read by the C library when a process starts.
BULK_ENVIRONMENT: dict[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
