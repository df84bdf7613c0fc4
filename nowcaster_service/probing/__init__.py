"""What a run's weights and read-outs are worth on a probe set: named by the operator, evaluated beside nowcasts."""
