package main

const sysSchedGetattr, sysIoprioGet, sysGetMempolicy = 275, 31, 236
