"""What a test of an index needs: the contract as a test case."""
