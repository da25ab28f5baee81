"""Stronger attackers, other clients, other protocols: what lies beyond the paper."""
