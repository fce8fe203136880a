// Vectors of 16 floats whatever the registers hold, in place of as many as they hold. (Seen with DEFORMLIT_ISA=baseline or avx2.)
// in isa.h
#define LANES 4
// write
#define LANES 16
// in isa.h
#define LANES 8
// write
#define LANES 16
