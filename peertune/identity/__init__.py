"""Who is who in a federation: certificates, the roster that the CA signs, and what a peer keeps of both."""
