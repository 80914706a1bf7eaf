from .plan import fused as fused
