"""Which files make up this disk, and who owns each cluster?"""
