package main

const sysSchedGetattr, sysIoprioGet, sysGetMempolicy = 315, 252, 239
