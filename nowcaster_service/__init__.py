"""The Ray-hosted nowcaster: keeps histories, runs predictors, serves predictions over gRPC."""
