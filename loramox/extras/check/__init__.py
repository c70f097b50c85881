"""Will a server load this adapter?"""
