"""What the replicas of a server share: Realtime sessions, so that one goes on with what another has lost."""
