package launch

const elfMachine = 62
