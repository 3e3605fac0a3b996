"""Do two chains read the same?"""
