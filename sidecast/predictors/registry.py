from sidecast.errors import ConfigError
from sidecast.predictors.linear import LinearPredictor


def create_predictor(name, *, weights=None, options=None):
    if name != "linear":
        raise ConfigError(f"predictor is {name!r}; allowed: linear")
    return LinearPredictor()
