"""Linear algebra on batches of matrices: polar factors, bounds on the spectral norm, maps of singular values."""

from normwise.norms.linalg.caps import cap_singular_values, soft_threshold_singular_values
from normwise.norms.linalg.convolution import circular_norm, convolution_norms, flattened_filter_norm, zero_padded_norm
from normwise.norms.linalg.polar import METHODS, error_bound, polar
from normwise.norms.linalg.ridge import ridge_inverse
from normwise.norms.linalg.spectral_norm import power_iteration, upper_bound
from normwise.norms.linalg.tracking import Tracked, cap, follow

__all__ = [
    "METHODS", "Tracked", "cap", "cap_singular_values", "circular_norm", "convolution_norms", "error_bound",
    "flattened_filter_norm", "follow", "polar", "power_iteration", "ridge_inverse", "soft_threshold_singular_values", "upper_bound",
    "zero_padded_norm",
]
