package launch

const elfMachine = 183
