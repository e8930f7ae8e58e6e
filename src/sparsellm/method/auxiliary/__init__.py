"""Auxiliary variables: the alternating minimisation that prunes a feed-forward unit.

``objective`` defines the function to minimise, ``updates`` has one update for each variable, ``loop`` alternates them.
"""
