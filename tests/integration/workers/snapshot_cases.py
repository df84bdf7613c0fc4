"""ZeRO stage and dtype of every case, and the step at which snapshots are compared."""

SNAPSHOT_STEP = 3
CASES = {
    "stage0-fp32": (0, "fp32"),
    "stage0-bf16": (0, "bf16"),
    "stage1-fp32": (1, "fp32"),
    "stage1-bf16": (1, "bf16"),
    "stage2-fp32": (2, "fp32"),
    "stage2-bf16": (2, "bf16"),
    "stage3-fp32": (3, "fp32"),
    "stage3-bf16": (3, "bf16"),
}
