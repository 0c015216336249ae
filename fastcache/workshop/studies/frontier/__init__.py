"""`fastcache frontier`: what every policy costs and gives, over a grid of settings."""
