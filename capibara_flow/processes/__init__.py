"""Processes of this machine: started so that they end with us, looked after, ended in order.

Free of asyncio and of anything heavy, so that a supervisor stays small and tests may use it anywhere.
"""
