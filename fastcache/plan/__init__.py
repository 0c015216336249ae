"""What every step, branch and layer does: tables, no tensors. Imports nothing else of the package but
errors.
"""
