/* What the library exports; everything else in it is hidden. */
#ifndef INGOT_API_H
#define INGOT_API_H

#if defined(__GNUC__)
#define INGOT_API __attribute__((visibility("default")))
#else
#define INGOT_API
#endif

#endif
