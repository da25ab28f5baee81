"""What a notebook imports beside the science: trials, sweeps, reports, figures, the audit of a
client.
"""
