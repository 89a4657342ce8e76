"""The program predict.py: put every image of a folder into a cluster."""
